# The command line in a container, which writes to the folder that is mounted at /work:
#   docker build --tag compress .
#   docker run --rm --volume "$PWD:/work" --user "$(id -u):$(id -g)" compress experiment=quickstart
# PyTorch comes with CUDA; TORCH_INDEX=URL takes it from another index of wheels, such as that of the smaller builds for
# CPUs which pytorch.org names; a GPU needs `docker run --gpus all`.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

RUN useradd --uid 1000 compress && mkdir /work && chown 1000 /work

# What is largest and changes least comes first, so that a change of the code rebuilds the last layers alone. The
# versions are those that pyproject.toml accepts.
ARG TORCH_INDEX=""
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.11" "torchvision>=0.26"

ARG EXTRAS="onnx,report,timm,pruning"
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
# hadolint ignore=DL3013
RUN mkdir compress conf && touch compress/__init__.py && pip install --no-cache-dir ".[$EXTRAS]"

COPY compress compress
COPY conf conf
COPY scripts scripts
RUN pip install --no-cache-dir --no-deps --force-reinstall .

USER 1000
WORKDIR /work
# Torch Hub, matplotlib and W&B keep files here, whichever user the container runs as.
ENV HOME=/tmp
ENTRYPOINT ["python", "/app/scripts/run.py"]
