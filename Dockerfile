# A trained workspace behind HTTP; docs/deploy.md says how to build and run it.
#   docker build --target cpu -t zutis-pipeline:cpu .
#   docker build --target cuda -t zutis-pipeline:cuda .
#   docker build --target onnx -t zutis-pipeline:onnx .
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS base
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    PIPELINE_CACHE=/cache
RUN python -m venv /opt/venv \
    && useradd --system --uid 10001 --create-home pipeline \
    && mkdir /workspace /cache \
    && chown pipeline /workspace /cache
COPY requirements.lock /opt/requirements.lock
COPY --from=wheel /wheels /opt/wheels

# With the index of torch's wheels without CUDA as TORCH_INDEX, a fraction of the size.
FROM base AS packages-cpu
ARG TORCH_INDEX=
RUN { [ -z "$TORCH_INDEX" ] || pip install --constraint /opt/requirements.lock \
        --index-url "$TORCH_INDEX" torch torchvision; } \
    && pip install --constraint /opt/requirements.lock \
        "zutis-pipeline[serve,onnx,video] @ file://$(ls /opt/wheels/*.whl)"

# torch as the package index has it, which brings CUDA's libraries; the host gives the driver.
FROM base AS packages-cuda
RUN pip install --constraint /opt/requirements.lock \
        "zutis-pipeline[serve,onnx,video] @ file://$(ls /opt/wheels/*.whl)"

# Without torch, for a file of `pipeline export --to onnx`; docs/deploy.md lists the same packages.
FROM base AS packages-onnx
RUN pip install --no-deps /opt/wheels/*.whl \
    && pip install --constraint /opt/requirements.lock \
        onnxruntime numpy pillow pycocotools pydantic ruamel.yaml typer tqdm filelock ftfy ijson \
        starlette uvicorn python-multipart

# No weights are part of an image: those of the workspace are used, and PIPELINE_CACHE keeps others.
FROM base AS service
USER 10001
WORKDIR /workspace
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["pipeline"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

FROM service AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-cuda /opt/venv /opt/venv

FROM service AS onnx
COPY --from=packages-onnx /opt/venv /opt/venv
CMD ["serve", "--onnx", "student.onnx", "--host", "0.0.0.0", "--port", "8000"]

FROM service AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv
