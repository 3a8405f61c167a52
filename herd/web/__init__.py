"""HTTP in: route table, admission, and the handlers behind them. Knows URLs; decides nothing about nodes."""
