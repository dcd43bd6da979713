"""ULSAD: networks, loss terms, and what checks them."""
