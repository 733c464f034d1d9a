"""What a run shows of itself: metrics, times, use of the machine, profiles."""
