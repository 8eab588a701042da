"""From a table of people to a served bank: personalise a model, predict and serve."""
