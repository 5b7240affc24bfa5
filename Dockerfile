# syntax=docker/dockerfile:1
# The image runs the job from its environment alone: docker run -e MODEL=... -e S3_PATH=... inkdask
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}

WORKDIR /opt/inkdask
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY inkdask ./inkdask
RUN pip install --no-cache-dir -c constraints.txt .

RUN useradd --create-home --uid 1000 inkdask
USER inkdask
WORKDIR /home/inkdask
ENTRYPOINT ["inkdask"]
CMD ["run"]
