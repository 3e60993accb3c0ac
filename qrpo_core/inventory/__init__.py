"""What a store holds, what of it an experiment uses, and its upkeep: ls, verify, gc, compact."""
