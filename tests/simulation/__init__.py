"""The whole control plane in one thread, on a simulated clock, from one seed."""
