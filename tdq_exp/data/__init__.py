"""Images in and out: training sets as memory-mapped uint8 caches, generated sets as resumable stores."""
