# robustclip with the versions that its tests pass with, on the CPU and on NVIDIA GPUs (the registry's torch has CUDA).
#   docker build -t robustclip . && docker run --rm -v "$PWD":/work robustclip test --config zero_shot
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY robustclip robustclip
RUN pip install --no-cache-dir --constraint constraints.txt '.[hf]'
WORKDIR /work
ENTRYPOINT ["robustclip"]
