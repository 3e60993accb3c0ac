# The server of a service. Built and run on a Debian base (docs/how-to/service.md).
# From the repository's root: docker build -f deployments/containers/server.Dockerfile -t qrpo-server .
# It listens on every address of its container, so it refuses to start without PREFECT_API_AUTH_STRING.
ARG BASE=python:3.11-slim
FROM ${BASE}

WORKDIR /app
COPY requirements.lock ./
RUN pip install --no-cache-dir -c requirements.lock prefect fastapi asyncpg numpy pyarrow s3fs
COPY qrpo_core ./qrpo_core
COPY tasks ./tasks
COPY flows ./flows

RUN useradd --create-home --uid 10001 qrpo && install -d -o qrpo /data
USER 10001
# The UI is copied at the start, by default into Prefect's own package, which this user cannot write.
ENV PREFECT_HOME=/data PREFECT_UI_STATIC_DIRECTORY=/data/ui PREFECT_SERVER_API_HOST=0.0.0.0
VOLUME /data
EXPOSE 4200
CMD ["python", "-m", "flows.service.serve"]
