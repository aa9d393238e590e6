"""Pictures and tables of runs: from run directories to what a paper prints."""
