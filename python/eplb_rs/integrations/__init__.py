"""Where the planner plugs into inference engines.

Installing the wheel changes nothing. The environment chooses, the same for all processes:

=======================  =====================================================================
``EPLB_RS_POLICY``       ``balanced`` or ``deepseek``: plan with eplb-rs. Unset: the engine's own.
``EPLB_RS_MAX_MOVES``    How many experts a replan may move to other ranks, as a part of all
                         slots, 0 to 1. Unset: any number.
``EPLB_RS_GROUP_RULE``   ``strict`` (as the engines' own where groups divide over nodes) or
                         ``free``.
``EPLB_RS_ITERATIONS``   How long the search may go on; see :class:`eplb_rs.Planner`.
``EPLB_RS_SHARES``       SGLang: split tokens by load, each expert's slots listed up to so many
                         times. Unset: evenly.
=======================  =====================================================================

:mod:`~eplb_rs.integrations.vllm` and :mod:`~eplb_rs.integrations.sglang` are found by the engines
themselves; :mod:`~eplb_rs.integrations.vllm_ascend` is a policy to hand over;
:mod:`~eplb_rs.integrations.tensorrt_llm` and :mod:`~eplb_rs.integrations.offline` write what
engines read at their start.
"""
