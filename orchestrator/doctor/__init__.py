"""What this host can isolate, item by item; the last word has a real container's self-test."""
