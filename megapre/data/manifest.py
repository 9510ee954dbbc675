"""``PREFIX.manifest.json``: the numbered pairs that ``preprocess_data.py --shard-tokens`` made of one corpus."""

from __future__ import annotations

import json

from megapre.data.remote import filesystem, is_remote

SUFFIX = ".manifest.json"


def members(path: str) -> list[str]:
    """Prefixes of the pairs that an entry of ``data.paths`` stands for: itself, or those that a manifest lists.

    Raises ValueError when the manifest is missing or is none.
    """
    if not path.endswith(SUFFIX):
        return [path]
    try:
        if is_remote(path):
            system, inside = filesystem(path)
            content = json.loads(system.cat_file(inside))
        else:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; data.paths holds prefixes of pairs, or manifests.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a manifest that preprocess_data writes ({error}).") from None
    names = content.get("pairs") if isinstance(content, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{path} is not a manifest that preprocess_data writes: its pairs are {names!r:.60}.")
    if len(set(names)) != len(names):
        raise ValueError(f"{path} lists a pair twice.")
    folder = path[: path.rfind("/") + 1]
    return [folder + name for name in names]
