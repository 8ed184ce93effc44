"""How much memory there is: budget, sizes, mount table, memory report."""
