# Jobledger with its examples, for docker-compose.yml. For your own app: FROM this image, COPY your package, set APP.
FROM python:3.11-slim

# What is installed changes seldom, the code often.
WORKDIR /build
COPY pyproject.toml LICENSE ./
COPY docs/pypi.md docs/
COPY jobledger jobledger
COPY schemas schemas
COPY consumers consumers
COPY streams streams
# aiohttp, airportsdata, psutil and tzdata are the demo's.
RUN pip install --no-cache-dir '.[worker,streams,registry,postgres,web]' aiohttp==3.* airportsdata==20260905 psutil tzdata==2026.6

RUN useradd --uid 10001 --create-home jobledger && mkdir /data && chown jobledger /data
WORKDIR /app
COPY examples examples
USER jobledger
ENV PYTHONUNBUFFERED=1 PYTHONPATH=/app JOBLEDGER_HOME=/data APP=examples.shop:app
VOLUME /data
ENTRYPOINT ["jobledger"]
CMD ["--help"]
