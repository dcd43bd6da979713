"""Provides the services of a run: devices, hosts, files, checkpoints, messages."""
