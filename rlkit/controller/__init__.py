"""The controller: places workers, runs the loop, keeps the records."""
