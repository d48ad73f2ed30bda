import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import java.util.UUID;
import org.apache.avro.Schema;
import org.apache.avro.generic.GenericData;
import org.apache.avro.generic.GenericRecord;
import org.apache.avro.generic.GenericRecordBuilder;
import org.apache.avro.message.BinaryMessageDecoder;
import org.apache.avro.message.BinaryMessageEncoder;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.serialization.StringSerializer;

/**
 * Submits a job to a queue and waits for its end on the lifecycle topic, by the schema and docs/wire.md alone.
 *
 * <p>Arguments: bootstrap, namespace, queue, task, the task's arguments as a JSON object, the path of job_event.avsc. Prints
 * one line for each fact of the job: its name, and the result of a success.
 */
public final class Wire {
    public static void main(String[] args) throws Exception {
        String bootstrap = args[0], namespace = args[1], queue = args[2], task = args[3], arguments = args[4];
        Schema schema = new Schema.Parser().parse(Files.readString(Path.of(args[5])));
        String id = UUID.randomUUID().toString();

        Properties common = new Properties();
        common.put("bootstrap.servers", bootstrap);
        try (KafkaConsumer<String, byte[]> lifecycle = reader(common, namespace)) {
            submit(common, schema, namespace + ".jobs." + queue, event(schema, id, queue, task, arguments), id);
            // Single-object encoding: the library checks the fingerprint of the writer's schema.
            BinaryMessageDecoder<GenericRecord> decoder = new BinaryMessageDecoder<>(GenericData.get(), schema);
            long deadline = System.nanoTime() + Duration.ofSeconds(60).toNanos();
            while (System.nanoTime() < deadline) {
                for (ConsumerRecord<String, byte[]> record : lifecycle.poll(Duration.ofMillis(200))) {
                    if (!id.equals(record.key())) {
                        continue;
                    }
                    GenericRecord fact = (GenericRecord) decoder.decode(record.value()).get("fact");
                    String name = fact.getSchema().getName();
                    if (name.equals("JobSucceeded")) {
                        ByteBuffer result = (ByteBuffer) fact.get("result");
                        System.out.println(name + " " + StandardCharsets.UTF_8.decode(result));
                        return;
                    }
                    System.out.println(name);
                }
            }
        }
        throw new IllegalStateException("job " + id + " did not succeed within 60 s");
    }

    private static KafkaConsumer<String, byte[]> reader(Properties common, String namespace) {
        Properties settings = new Properties();
        settings.putAll(common);
        settings.put("group.id", "wire-" + UUID.randomUUID());
        settings.put("auto.offset.reset", "earliest");
        KafkaConsumer<String, byte[]> made =
                new KafkaConsumer<>(settings, new StringDeserializer(), new ByteArrayDeserializer());
        made.subscribe(List.of(namespace + ".lifecycle"));
        return made;
    }

    private static GenericRecord event(Schema schema, String id, String queue, String task, String arguments) {
        Schema submitted = schema.getField("fact").schema().getTypes().stream()
                .filter(type -> type.getName().equals("JobSubmitted")).findFirst().orElseThrow();
        GenericRecord spec = new GenericRecordBuilder(submitted.getField("spec").schema())
                .set("args", ByteBuffer.wrap(arguments.getBytes(StandardCharsets.UTF_8)))
                .set("tags", Map.of("by", "java"))
                .set("parent", null)
                .build();
        return new GenericRecordBuilder(schema)
                .set("event_id", id).set("job_id", id)
                .set("run", 1L).set("attempt", 1L).set("release", 1L)
                .set("occurred_at", System.currentTimeMillis() * 1000)
                .set("task", task).set("queue", queue)
                .set("key", null).set("home", null).set("source", "java").set("trace", null)
                .set("fact", new GenericRecordBuilder(submitted)
                        .set("spec", spec).set("delay_ms", null).set("due_at", null).build())
                .build();
    }

    private static void submit(Properties common, Schema schema, String topic, GenericRecord event, String id)
            throws Exception {
        Properties settings = new Properties();
        settings.putAll(common);
        settings.put("acks", "all");
        byte[] schemaText = schema.toString().getBytes(StandardCharsets.UTF_8);
        byte[] value = bytes(new BinaryMessageEncoder<GenericRecord>(GenericData.get(), schema).encode(event));
        // The head's eight bytes are the schema's fingerprint; it stands on <ns>.schemas before the first record does.
        StringBuilder fingerprint = new StringBuilder();
        for (int at = 2; at < 10; at++) {
            fingerprint.append(String.format("%02x", value[at]));
        }
        String schemas = topic.substring(0, topic.indexOf(".jobs.")) + ".schemas";
        try (KafkaProducer<String, byte[]> producer =
                new KafkaProducer<>(settings, new StringSerializer(), new ByteArraySerializer())) {
            producer.send(new ProducerRecord<>(schemas, fingerprint.toString(), schemaText)).get();
            producer.send(new ProducerRecord<>(topic, id, value)).get();
        }
    }

    private static byte[] bytes(ByteBuffer buffer) {
        byte[] found = new byte[buffer.remaining()];
        buffer.get(found);
        return found;
    }
}
