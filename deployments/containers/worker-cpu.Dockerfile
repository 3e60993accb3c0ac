# A worker of the pool `cpu`, and where `make deploy` can run. Built and run on a Debian base.
# From the repository's root: docker build -f deployments/containers/worker-cpu.Dockerfile -t qrpo-worker-cpu .
# The torch that pip takes by itself carries CUDA (2.6 GB more): give an index with CPU builds to go without,
# --build-arg PIP_EXTRA_INDEX_URL=...
ARG BASE=python:3.11-slim
FROM ${BASE}

ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /app
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY qrpo_core ./qrpo_core
COPY tasks ./tasks
COPY flows ./flows
COPY experiments ./experiments
COPY deployments ./deployments
RUN pip install --no-cache-dir -c requirements.lock -e '.[pipeline,rewards,lora]' \
    && useradd --create-home --uid 10001 qrpo && install -d -o qrpo /store
USER 10001
# As flows/service/workers.py sets it for its runs.
ENV PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 PREFECT_CLIENT_MAX_RETRIES=8 OMP_WAIT_POLICY=PASSIVE DO_NOT_TRACK=1 \
    PREFECT_LOGGING_EXTRA_LOGGERS=qrpo PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW=ignore \
    PREFECT_WORKER_QUERY_SECONDS=2
CMD ["prefect", "worker", "start", "--pool", "cpu", "--type", "process"]
