"""Everything that exists only while FAISS and pgvector run side by side; removed with FAISS."""
