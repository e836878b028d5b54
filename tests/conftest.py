"""What holds for all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# How fast this machine is just now, is nothing that a test may depend on.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
