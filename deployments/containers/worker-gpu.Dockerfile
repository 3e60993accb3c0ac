# A worker of the pool `gpu`, with vLLM. It has never been built: read it before you rely on it.
# From the repository's root: docker build -f deployments/containers/worker-gpu.Dockerfile -t qrpo-worker-gpu .
# Run it with --gpus device=0 --ipc=host, a container for each GPU or set of GPUs.
ARG BASE=vllm/vllm-openai:v0.32.0
FROM ${BASE}

WORKDIR /app
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY qrpo_core ./qrpo_core
COPY tasks ./tasks
COPY flows ./flows
COPY experiments ./experiments
COPY deployments ./deployments
# An environment of its own, since vLLM pins another torch and fastapi; .venv-vllm is where the project looks
# for the interpreter that has vLLM, which is this image's.
RUN mkdir -p .venv-vllm/bin && ln -s "$(command -v python3)" .venv-vllm/bin/python \
    && python3 -m venv /opt/qrpo \
    && /opt/qrpo/bin/pip install --no-cache-dir -c requirements.lock -e '.[pipeline,rewards,lora]'
ENV PATH=/opt/qrpo/bin:$PATH

RUN useradd --create-home --uid 10001 qrpo && install -d -o qrpo /store
USER 10001
# As flows/service/workers.py sets it for its runs.
ENV PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 PREFECT_CLIENT_MAX_RETRIES=8 OMP_WAIT_POLICY=PASSIVE DO_NOT_TRACK=1 \
    PREFECT_LOGGING_EXTRA_LOGGERS=qrpo PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW=ignore \
    PREFECT_WORKER_QUERY_SECONDS=2
ENTRYPOINT []
CMD ["prefect", "worker", "start", "--pool", "gpu", "--type", "process", "--limit", "1"]
