"""The shapes of schedules, by name."""

from __future__ import annotations

from moesaic._registry import MethodInfo, MethodTable

SCHEDULES = MethodTable(
    "schedule",
    [
        MethodInfo(
            name="exponential",
            target="moesaic.nn.schedules.exponential:exponential",
            config="moesaic.nn.schedules._base:ScheduleConfig",
            summary="Changes by the same factor at every step",
            paper="EvoMoE, arXiv 2112.14397",
        ),
        MethodInfo(
            name="linear",
            target="moesaic.nn.schedules.linear:linear",
            config="moesaic.nn.schedules._base:ScheduleConfig",
            summary="Changes by the same amount at every step",
            paper="EvoMoE, arXiv 2112.14397",
        ),
        MethodInfo(
            name="switch",
            target="moesaic.nn.schedules.switch:switch",
            config="moesaic.nn.schedules._base:ScheduleConfig",
            summary="Keeps its start and changes at once when its steps are over",
            paper="Sigma-MoE-Tiny, arXiv 2512.16248",
        ),
    ],
)
