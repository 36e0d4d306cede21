"""What is built on the engine: texts, drafts, gaps, scores, traces, replays."""
