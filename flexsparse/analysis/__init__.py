"""From a mask to the classes of its blocks: bounds, refinement, and what else can be proved."""
