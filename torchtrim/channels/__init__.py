"""Which channels go together: labels followed through a forward, and what they tie."""
