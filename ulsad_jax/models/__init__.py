"""The networks, as purely functional Linen modules."""
