"""Zip ``.pt`` files: records, their pickle, ragged lists, the writer."""
