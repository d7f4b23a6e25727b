"""Several ranks on one run: who does what, how networks are sharded, what is averaged, saved and loaded."""
