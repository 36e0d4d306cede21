"""From checked inputs to an output: plan, forward, choose, commit, step by step."""
