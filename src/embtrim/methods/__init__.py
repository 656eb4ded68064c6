"""Search methods, one file each: search(task, config, budget, seed) -> SizePlan."""
