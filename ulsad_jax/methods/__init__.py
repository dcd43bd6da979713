"""Methods that detect anomalies: each learns from normal images and gives maps."""
