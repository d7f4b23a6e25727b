"""What a run tells of itself: means and histograms per interval, probes of the forbidden zone, rules of health."""
