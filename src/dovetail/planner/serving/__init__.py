"""Plans for serving: a pool that reads prompts, and a pool that writes outputs."""
