"""What the fuzzer is made of: a case, its random input, and what is asked of the planner."""
