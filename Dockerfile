# One image for CPUs and GPUs: torch includes the CUDA libraries, the host provides the driver (docker run --gpus all).
#
#   docker build -t csmae .
#   docker run --rm -it --shm-size=2g -v "$PWD/runs:/home/csmae/csmae/runs" csmae csmae search spaces/quickstart.yaml
#
# User 1000 must be able to write the folder mounted at runs.
FROM python:3.12-slim

# KubeRay's health checks call wget
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 csmae
WORKDIR /home/csmae/csmae
RUN chown csmae:csmae .
USER csmae
ENV PATH=/home/csmae/.venv/bin:$PATH PYTHONUNBUFFERED=1

# the pinned versions first: this layer of several GB is rebuilt only when they change
COPY --chown=csmae constraints.txt ./
RUN python -m venv /home/csmae/.venv \
    && pip install --no-cache-dir -c constraints.txt "ray[default,tune,train]" torch torchvision timm mlflow

COPY --chown=csmae pyproject.toml README.md LICENSE search.py train_worker.py ./
COPY --chown=csmae csmae csmae
COPY --chown=csmae spaces spaces
RUN pip install --no-cache-dir -c constraints.txt .

CMD ["csmae", "--help"]
