"""What everything else stands on: problems and their sentences, the run folder
and its lock, this machine, the stages."""
