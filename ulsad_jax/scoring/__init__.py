"""From maps to one scale, thresholds, scores and decisions."""
