"""Many configurations of one experiment: their runs, who goes on, and one table."""
