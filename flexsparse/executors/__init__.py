"""What runs a launch: each module computes attention in its own way, and `reference` defines it.

run(q, k, v, ...) -> (out, lse). Its other arguments are the mask in terms of its own. lse may be
None where nobody asked for it.

unsupported(...) -> why it cannot run a call, as the end of a sentence, or None. `run` trusts that
it was asked; `reference` runs every call and has none. Of sdpa and gather it asks about the mask
alone, once, and `unsupported_extras` about what each call wants besides.
"""
