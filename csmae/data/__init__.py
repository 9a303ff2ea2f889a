"""The data room: archives on disk become batches of pairs in memory."""
