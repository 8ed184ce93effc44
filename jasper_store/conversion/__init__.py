"""Files written and checked: the atomic writer, conversion with its proof, verification, and DatasetWriter."""
