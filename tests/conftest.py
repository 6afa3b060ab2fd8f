import os

# One thread: the suite shares two cores with the workers that it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
