"""Sweeps: planning and preview, the orchestrator, its launchers, and one supervisor per attempt."""
