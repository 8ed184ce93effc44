"""What a power failure leaves: every operation of a writer is recorded, and any that was not synced may be missing."""
