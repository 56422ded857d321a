"""What a person looks at: a comparison before a run, a report while it trains and after."""
