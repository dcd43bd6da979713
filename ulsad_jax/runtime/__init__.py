"""What runs need of the machine: devices, hosts, files, checkpoints, messages."""
