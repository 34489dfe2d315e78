"""Run Warren: recipes, the stage table, executors, the command line, reports and the demo."""
