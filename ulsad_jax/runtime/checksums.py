"""Computes checksums of checkpoint items; Orbax has none of array contents."""

from __future__ import annotations

import json
import zlib
from typing import Any

import jax
import numpy as np

from ulsad_jax.runtime import hosts


def digest(value: Any) -> dict[str, Any]:
    """Returns the checksum of a value that is saved as JSON."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return {"crc32": zlib.crc32(text.encode())}


def digest_arrays(tree: Any) -> dict[str, Any]:
    """Returns the checksum and the layout of a tree of arrays."""
    checksum = 0
    for leaf in jax.tree.leaves(tree):
        if not leaf.is_fully_replicated:  # it may lie on other hosts, too
            leaf = hosts.gather(leaf)
        flat = np.ascontiguousarray(jax.device_get(leaf)).reshape(-1)
        checksum = zlib.crc32(flat.view(np.uint8), checksum)
    return {"crc32": checksum, "layout": describe_layout(tree)}


def describe_layout(tree: Any) -> dict[str, str]:
    """Returns the type and shape of every array in a tree, by its path."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
