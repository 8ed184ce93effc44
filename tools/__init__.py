"""Programs for the people who develop jasper_store; not part of the installed package."""
