# The server of a service. Never built where it was written: read it before you rely on it.
# From the repository's root: docker build -f deployments/containers/server.Dockerfile -t qrpo-server .
# It listens on every address of its container, so it refuses to start without PREFECT_API_AUTH_STRING.
FROM python:3.11-slim

WORKDIR /app
COPY requirements.lock ./
RUN pip install --no-cache-dir -c requirements.lock prefect fastapi asyncpg
COPY qrpo_core ./qrpo_core
COPY tasks ./tasks
COPY flows ./flows

RUN useradd --create-home --uid 10001 qrpo && install -d -o qrpo /data
USER 10001
ENV PREFECT_HOME=/data PREFECT_SERVER_API_HOST=0.0.0.0
VOLUME /data
EXPOSE 4200
CMD ["python", "-m", "flows.serve"]
