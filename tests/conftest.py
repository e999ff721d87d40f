"""What all tests share."""

from hypothesis import HealthCheck, settings

# Failures print how to reproduce them; machines are shared, so time is not a failure.
settings.register_profile(
    "eplb_rs",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("eplb_rs")
