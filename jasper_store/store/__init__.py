"""One tensor API: where each tensor lives is planned, guarded, explained; rows are read alike from everywhere."""
